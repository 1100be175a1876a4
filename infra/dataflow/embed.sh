#!/usr/bin/env bash
# `fusion embed` on Dataflow with a GPU on each worker; waits for the end, and says which units failed.
#
#   PROJECT=… REGION=us-central1 BUCKET=gs://… IMAGE=…/fusion:dataflow infra/dataflow/embed.sh
#
# Needs fusion-features[dataflow] here, but no GPU: so the precision is named (auto would be what suits this machine),
# and the device is not (each worker finds its own). The accelerator is asked for once, for all workers; right fitting (a resource
# hint on the embedding step) is the other way and must not be combined with it. One SDK process a worker, or each
# core loads the model; number_of_worker_harness_threads is how many units a GPU has in flight.
set -euo pipefail
fusion embed \
    --input "${INPUT:-$BUCKET/shards/*.tar}" \
    --output "${OUTPUT:-$BUCKET/table}" \
    --model "${MODEL:-ViT-B-32}" --pretrained "${PRETRAINED:-laion2b_s34b_b79k}" \
    --precision "${PRECISION:-bf16}" --max-dead-letters 1% \
    --runner=DataflowRunner \
    --project="$PROJECT" --region="$REGION" --temp_location="$BUCKET/tmp" --staging_location="$BUCKET/staging" \
    --sdk_container_image="$IMAGE" --sdk_location=container \
    --dataflow_service_options=worker_accelerator="${ACCELERATOR:-type:nvidia-l4;count:1;install-nvidia-driver}" \
    --experiments=no_use_multiple_sdk_containers --number_of_worker_harness_threads=3 \
    --machine_type="${MACHINE:-g2-standard-8}" --disk_size_gb=100 \
    --max_num_workers="${WORKERS:-8}" --autoscaling_algorithm=THROUGHPUT_BASED
