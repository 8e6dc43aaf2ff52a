"""Routes messages to the reference answer that is closest to what an answer to them would say.

python examples/triage_by_references.py
"""

from llm2vec_gen_jax import LLM2VecGen

# One answer for each queue. To route by other answers, edit these: nothing is trained.
REFERENCES = {
    "passwords": "To reset your password, open the login page, choose 'Forgot password' and follow the link we send.",
    "refunds": "We refund your money within five days of receiving the returned item. Include the invoice.",
    "delivery": "Your parcel is on its way. You can follow the shipment with the tracking number.",
    "outages": "The service is down at the moment. Our engineers are working on it; please try again later.",
}
MESSAGES = [
    "I can't get into my account any more.",
    "My shoes are the wrong size, I want my money back.",
    "Where is my order? I bought it a week ago.",
    "The website shows an error on every page.",
    "It says that my login is wrong.",
    "Has my package been shipped?",
    "What is the capital of France?",
]
# A person reads what is not close to any answer, or about as close to two.
LEAST_COSINE, LEAST_MARGIN = 0.2, 0.03


def main() -> None:
    model = LLM2VecGen.from_pretrained("smollm2-135m")
    queues = list(REFERENCES)
    cosines = model.similarity(model.encode(MESSAGES), model.encode(list(REFERENCES.values())))
    for message, scores in zip(MESSAGES, cosines):
        second, best = scores.argsort()[-2:]
        is_clear = scores[best] > LEAST_COSINE and scores[best] - scores[second] > LEAST_MARGIN
        print(f"{queues[best] if is_clear else '(a person)':<10}  {scores[best]:5.2f}  {message}")


if __name__ == "__main__":
    main()
