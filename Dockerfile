# SPDX-License-Identifier: Apache-2.0
# Stock vLLM and the wheel of dist/ (make wheel):
#   docker build -t turbokv . && docker run --gpus all -p 8000:8000 turbokv Qwen/Qwen3-8B --preset tq_k5v3
ARG VLLM_VERSION=0.33.0
FROM vllm/vllm-openai:v${VLLM_VERSION}
COPY dist/turbokv_cache-*.whl /tmp/wheels/
# vLLM's image decides about PyTorch: only what our wheel needs besides may be added.
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/wheels/*.whl \
 && rm -r /tmp/wheels && turbokv --version
ENTRYPOINT ["turbokv", "serve"]
