# docker build -f launch/docker/tpu.Dockerfile -t llm2vec-gen-jax:tpu .
# docker run --privileged --net=host -v "$PWD:/data" llm2vec-gen-jax:tpu python -m launch.train ...
FROM python:3.11-slim
WORKDIR /llm2vec_gen_jax
COPY requirements.txt requirements-ci.lock ./
RUN pip install --no-cache-dir -c requirements-ci.lock -r requirements.txt "jax[tpu]"
COPY . .
CMD ["python", "-m", "launch.quickstart"]
