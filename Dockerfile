# Image for a cluster: NVIDIA's PyTorch image keeps its own torch, CUDA, NCCL, TransformerEngine and flash-attn.
# Not built here: no container engine and no GPU where this project is developed.
FROM nvcr.io/nvidia/pytorch:25.10-py3

WORKDIR /opt/megatron_cm3leon
COPY . .
# The image's own packages win over constraints.txt, which is for CPU machines.
RUN pip list --format=freeze | grep -iE '^(torch|triton|transformer[_-]engine|flash[_-]attn)=' > /tmp/image.txt || true \
    && grep -vE '^(torch|triton)==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -c /tmp/image.txt -e ".[dev]"

ENV PYTHONUNBUFFERED=1
CMD ["bash"]
