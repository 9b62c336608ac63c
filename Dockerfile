# NVIDIA's NeMo image has CUDA, torch, Transformer Engine, Megatron-Core and Megatron Bridge; give a tag of it:
#   docker build --build-arg NEMO=IMAGE:TAG -t nemodiff .
ARG NEMO
FROM ${NEMO}
WORKDIR /opt/nemodiff
COPY . .
# Nothing of the image is replaced: --no-deps, since Bridge's own installation brings all that this package imports.
# The image's PIP_CONSTRAINT is for what NVIDIA has built; it would also hold for the tools of this one build.
RUN PIP_CONSTRAINT= python -m pip install --no-deps --no-cache-dir .
# Other versions than pyproject.toml asks for are only named: NVIDIA's own have names like 2.11.0a0. Missing ones end it.
RUN python -m pip check | tee /tmp/check | grep '^nemodiff-train ' ; \
    ! grep '^nemodiff-train .* not installed' /tmp/check && nemodiff --version
# Not in the sources: what is imported is what was installed.
WORKDIR /workspace
