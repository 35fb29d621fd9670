# Image for a cluster: NVIDIA's PyTorch image keeps its own torch, CUDA, NCCL, TransformerEngine, apex and flash-attn.
# Not built here: no container engine and no GPU where this project is developed.
# Any image with torch 2.6 or later will do: docker build --build-arg BASE=nvcr.io/nvidia/pytorch:TAG . Initial weights
# do not depend on its torch; which attention kernel torch takes does (2.11 and later: cuDNN's on Hopper).
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

WORKDIR /opt/megatron_cm3leon
COPY . .
# The image's own packages win over constraints.txt, which is for CPU machines. faiss-cpu is not installed: it would lie
# over a build of FAISS for GPUs, as both are the module faiss. One that the image has is kept.
RUN pip list --format=freeze | grep -iE '^(torch|triton|transformer[_-]engine|flash[_-]attn|apex)=' > /tmp/image.txt || true \
    && grep -vE '^(torch|triton)==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -c /tmp/image.txt -e ".[deepspeed,test]" \
    && { python -c 'import faiss' || pip install --no-cache-dir -c /tmp/constraints.txt -c /tmp/image.txt faiss-gpu; }

ENV PYTHONUNBUFFERED=1
CMD ["bash"]
