"""Searches text files by what they say: the passage that answers a question need not share words with it.

python examples/search_folder.py [FOLDER QUESTION]
"""

import pathlib
import sys

from llm2vec_gen_jax import LLM2VecGen

# Used without arguments: file name -> text.
NOTES = {
    "baking.txt": "Yeast feeds on sugar and gives off gas, which blows bubbles into the dough so that it swells.",
    "battery.txt": "Lithium cells age fastest when they are kept fully charged in a hot place.",
    "garden.txt": "Tomatoes need six hours of sun; water the soil in the morning and keep the leaves dry.",
    "history.txt": "The Bastille was stormed by the people of Paris on 14 July 1789.",
    "moon.txt": "The gravity of the Moon pulls the water of the oceans towards it, twice a day.",
    "sleep.txt": "Blue light from screens delays melatonin, the hormone that makes us tired in the evening.",
}
QUESTIONS = (
    "How do I make bread rise?",
    "Why does the sea go up and down?",
    "How can I fall asleep earlier?",
    "When did the French Revolution begin?",
)


def main() -> None:
    if len(sys.argv) == 3:
        files = sorted(pathlib.Path(sys.argv[1]).rglob("*.txt")) + sorted(pathlib.Path(sys.argv[1]).rglob("*.md"))
        notes = {str(file): file.read_text(encoding="utf-8") for file in files}
        questions: tuple[str, ...] = (sys.argv[2],)
    else:
        notes, questions = NOTES, QUESTIONS
    # Passages of several lines are embedded paragraph by paragraph.
    passages = [(name, part.strip()) for name, text in notes.items() for part in text.split("\n\n") if part.strip()]

    model = LLM2VecGen.from_pretrained("smollm2-135m")
    documents = model.encode_document([text for _, text in passages])
    queries = model.encode_query(list(questions))
    for question, scores in zip(questions, model.similarity(queries, documents)):
        print(question)
        for rank in scores.argsort()[::-1][:2]:
            name, text = passages[rank]
            print(f"  {scores[rank]:.2f}  {name}: {text[:60]}")


if __name__ == "__main__":
    main()
