# NVIDIA's NeMo image has CUDA, Transformer Engine, Megatron-Core and Megatron Bridge; give a tag of it:
#   docker build --build-arg NEMO=IMAGE:TAG -t nemodiff .
ARG NEMO
FROM ${NEMO}
WORKDIR /opt/nemodiff
COPY . .
# The image's own torch and Transformer Engine stay; constraints.txt is for hosts without them.
RUN python -m pip install --no-deps --no-cache-dir . && nemodiff --version
