# Serves a model on a CPU. This image was never built: where it was written there was no docker engine.
# docker build -t unmask . && docker run -p 8000:8000 -v $PWD/outputs/demo/final:/model:ro -e UNMASK_API_KEY=... unmask
FROM python:3.11-slim
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY scripts/long_description.py scripts/
COPY docs docs
COPY recipes recipes
COPY unmask unmask
# The index of torch's CPU builds, where yours has only those for CUDA (several GB): --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0 '.[serve]'
RUN useradd --create-home unmask
USER unmask
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
# exec form: SIGTERM reaches the server, which finishes what runs
ENTRYPOINT ["unmask", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
