#!/usr/bin/env bash
# Publishes the Flex Template, and launches it (schedulers can: it is one request).
#
#   PROJECT=… REGION=us-central1 BUCKET=gs://… IMAGE=…/fusion:dataflow infra/dataflow/template.sh build
#   PROJECT=… REGION=us-central1 BUCKET=gs://… IMAGE=…/fusion:dataflow infra/dataflow/template.sh run
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in
build)
    gcloud dataflow flex-template build "$BUCKET/templates/fusion-embed.json" --project "$PROJECT" \
        --image "$IMAGE" --sdk-language PYTHON --metadata-file metadata.json
    ;;
run)
    gcloud dataflow flex-template run "fusion-embed-$(date -u +%Y%m%d-%H%M%S)" --project "$PROJECT" --region "$REGION" \
        --template-file-gcs-location "$BUCKET/templates/fusion-embed.json" \
        --parameters "input=${INPUT:-$BUCKET/shards/*.tar},output=${OUTPUT:-$BUCKET/table}" \
        --parameters "model=${MODEL:-ViT-B-32},pretrained=${PRETRAINED:-laion2b_s34b_b79k},precision=${PRECISION:-bf16}" \
        --parameters "sdk_container_image=$IMAGE" --max-workers "${WORKERS:-8}" \
        --worker-machine-type "${MACHINE:-g2-standard-8}" \
        --additional-experiments no_use_multiple_sdk_containers \
        --additional-pipeline-options "dataflow_service_options=worker_accelerator=${ACCELERATOR:-type:nvidia-l4;count:1;install-nvidia-driver}"
    ;;
*)
    echo "usage: $0 build|run" >&2
    exit 2
    ;;
esac
