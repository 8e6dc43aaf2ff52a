"""Repositories of the Hugging Face hub: the local folder of a model, and the rows of a dataset."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, first_line


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How a hub repository is downloaded, as in huggingface_hub.snapshot_download.

    revision: branch, tag or commit, default main. token: access token, default the one of `hf auth login`. cache_dir:
    default that of huggingface_hub. local_files_only: use only what is in the cache.
    Raises InputError for a value of the wrong type, an empty text, and a token that no HTTP header can contain.
    """

    revision: str | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.local_files_only, bool):
            raise InputError(f"local_files_only={self.local_files_only!r}: expected True or False")
        if not isinstance(self.revision, str | None):
            raise InputError(f"revision={self.revision!r}: expected a branch, tag or commit")
        # The messages of HTTP clients contain an invalid token, so it is never passed to one.
        token = self.token
        if not isinstance(token, str | bool | None) or (isinstance(token, str) and not re.fullmatch(r"[!-~]*", token)):
            raise InputError("token: not an access token, which is printable ASCII text without spaces")
        for key in ("revision", "token", "cache_dir"):  # as from an unset shell variable; the default would be used
            if getattr(self, key) == "":
                raise InputError(f"{key} is empty: pass a value, or leave {key} out")

    def hide_token(self, text: str) -> str:
        """Returns a message of another library without the token."""
        return text.replace(self.token, "<token>") if isinstance(self.token, str) else text


DEFAULT_HUB = HubOptions()


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether a name is looked up on the hub: NAMESPACE/NAME, where NAMESPACE is not a local folder.

    With a local folder NAMESPACE the name is a mistyped path, which must not cause network access.
    """
    match = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", str(path))
    return match is not None and not pathlib.Path(match[1]).exists()


def require_no_revision(path: str | os.PathLike[str], hub: HubOptions) -> None:
    """Raises InputError if a revision is passed with a `path` that is not on the hub."""
    if hub.revision:
        raise InputError(
            f"{path}: not on the hub, so it has no revision={hub.revision}. Remove revision, or pass a hub id"
        )


def fetch_from_hub(
    repository: str | os.PathLike[str], patterns: Sequence[str], hub: HubOptions = DEFAULT_HUB
) -> pathlib.Path:
    """Returns the local snapshot of a hub repository. Raises InputError when the download fails."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    what = f"its revision={hub.revision}" if hub.revision else "it"
    try:
        return pathlib.Path(
            snapshot_download(
                str(repository),
                revision=hub.revision,
                token=hub.token,
                cache_dir=None if hub.cache_dir is None else str(hub.cache_dir),
                local_files_only=hub.local_files_only,
                allow_patterns=list(patterns),
            )
        )
    except RevisionNotFoundError:
        raise InputError(
            f"{repository}: has no revision={hub.revision} on the hub. Pass a branch, tag or commit of it"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if hub.local_files_only and isinstance(error, LocalEntryNotFoundError):
            cache = constants.HF_HUB_CACHE if hub.cache_dir is None else hub.cache_dir
            raise InputError(
                f"{repository}: {what} is not, or not completely, in the cache {cache}. Remove local_files_only to "
                "download it, or set cache_dir to the folder of another cache"
            ) from None
        reason = hub.hide_token(first_line(error))
        raise InputError(
            f"{repository}: no such local folder, and {what} cannot be fetched from the hub ({reason})"
        ) from None


def load_dataset(name: str, split: str, hub: HubOptions = DEFAULT_HUB) -> Any:
    """Returns a split of a hub dataset as a datasets.Dataset. Raises InputError when it cannot be loaded."""
    import datasets

    cache = None if hub.cache_dir is None else str(hub.cache_dir)
    try:
        with offline_datasets(hub.local_files_only):
            return datasets.load_dataset(name, split=split, revision=hub.revision, token=hub.token, cache_dir=cache)
    except Exception as error:  # datasets raises many types for a dataset that cannot be loaded
        where = ", in the cache because of local_files_only," if hub.local_files_only else ""
        raise InputError(
            f"{name}: neither a file nor a Hugging Face dataset{where} with the split {split!r} "
            f"({hub.hide_token(first_line(error))})"
        ) from None


@contextlib.contextmanager
def offline_datasets(local_files_only: bool = True) -> Iterator[None]:
    """Makes the package datasets use only what is in its cache, for which it has no argument."""
    if not local_files_only:
        yield
        return
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
