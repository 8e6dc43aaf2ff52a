# docker build -f launch/docker/serve.Dockerfile -t llm2vec-gen-jax:serve .
# docker run -p 8000:8000 -v "$PWD/model:/model:ro" llm2vec-gen-jax:serve /model
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG JAX=jax
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=bind,source=requirements-ci.lock,target=/requirements-ci.lock \
    pip install --no-cache-dir -c /requirements-ci.lock "$(echo /wheels/*.whl)[serve]" "$JAX"
# Downloads and compiled programs, of any user: mount a volume there to keep them.
ENV LLM2VEC_GEN_CACHE=/cache HF_HOME=/cache/huggingface
RUN mkdir --mode=1777 /cache && useradd --create-home --uid 1000 user
USER 1000
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["llm2vec-gen", "serve", "host=0.0.0.0"]
CMD ["smollm2-135m"]
