# docker build -f launch/docker/tpu.Dockerfile -t llm2vec-gen-jax:tpu .
# docker run --privileged --net=host -v "$PWD:/data" --user "$(id -u)" llm2vec-gen-jax:tpu python -m launch.train ...
FROM python:3.11-slim
WORKDIR /llm2vec_gen_jax
COPY requirements.txt requirements-ci.lock ./
RUN pip install --no-cache-dir -c requirements-ci.lock -r requirements.txt "jax[tpu]"
COPY . .
# Downloads and compiled programs, of any user: mount a volume there to keep them.
ENV LLM2VEC_GEN_CACHE=/cache HF_HOME=/cache/huggingface
RUN mkdir --mode=1777 /cache && useradd --create-home --uid 1000 user && chown user .
# Where the device files belong to root, run it with --user root.
USER 1000
CMD ["python", "-m", "launch.quickstart"]
