# docker build -f launch/docker/gpu.Dockerfile -t llm2vec-gen-jax:gpu .
# docker run --gpus all -v "$PWD:/data" llm2vec-gen-jax:gpu python -m launch.train ...
FROM python:3.11-slim
WORKDIR /llm2vec_gen_jax
COPY requirements.txt requirements-ci.lock ./
RUN pip install --no-cache-dir -c requirements-ci.lock -r requirements.txt "jax[cuda13]"
COPY . .
CMD ["python", "-m", "launch.quickstart"]
