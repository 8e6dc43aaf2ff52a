"""The description for PyPI: README.md with absolute links. All other metadata is in pyproject.toml."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent


def absolute_links(text: str, repository: str | None) -> str:
    """Returns Markdown with relative links and images as addresses in a GitHub repository, or without them if None."""

    def replace(match):
        image, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if repository is None:
            return "" if image else label
        return f"{image}[{label}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, text)


if __name__ == "__main__":
    from setuptools import setup

    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, urls.get("Repository")),
        long_description_content_type="text/markdown",
    )
