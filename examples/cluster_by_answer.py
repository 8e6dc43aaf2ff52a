"""Groups questions by their answers, not by their words.

python examples/cluster_by_answer.py
"""

from scipy.cluster.hierarchy import fcluster, linkage

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.lens.logit import over_tokens

QUESTIONS = [
    "What is the capital of France?",
    "Where is the Eiffel Tower?",
    "In which city is the Louvre?",
    "Who wrote Hamlet?",
    "Which playwright created Romeo and Juliet?",
    "Who is the author of Macbeth?",
    "How do plants make their food?",
    "What do leaves do with sunlight?",
    "Why are leaves green?",
    "How do I boil an egg?",
    "How long do I cook pasta?",
    "How do I steam rice?",
]
GROUPS = 4


def main() -> None:
    model = LLM2VecGen.from_pretrained("smollm2-135m")
    vectors = model.encode(QUESTIONS)
    vectors = vectors - vectors.mean(axis=0)  # embeddings of one LLM have a large common component
    groups = fcluster(linkage(vectors, "average", metric="cosine"), GROUPS, "maxclust")
    for group in sorted(set(groups)):
        members = [question for question, own in zip(QUESTIONS, groups) if own == group]
        # The most probable words of the compression tokens name what the group is about.
        lenses = [over_tokens(tokens) for tokens in model.logit_lens(members, top_k=5, words=True)]
        words = dict.fromkeys(lens[0].text for lens in lenses)
        print(f"group {group}: {', '.join(words)}")
        for question in members:
            print(f"  {question}")


if __name__ == "__main__":
    main()
