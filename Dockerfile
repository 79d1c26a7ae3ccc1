# The default command trains on the digits; docs/launch.md says how to build and use the image.
ARG PYTHON=3.14
FROM python:${PYTHON}-slim

# Of pyproject.toml: none for CPUs, cuda for NVIDIA GPUs, tpu; several as cuda,onnx,wandb.
ARG EXTRAS=""

COPY . /source
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "/source${EXTRAS:+[$EXTRAS]}" \
    && useradd --uid=1000 --create-home ffl \
    # For any user: docker run --user.
    && install --directory --mode=1777 /ffl_jax

WORKDIR /ffl_jax
USER 1000
CMD ["python", "-m", "ffl_jax.main"]
