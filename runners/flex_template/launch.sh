#!/usr/bin/env bash
# Builds the image and the template, or runs the template. The README beside this says more.
#
#   launch.sh build
#   launch.sh run input='gs://BUCKET/corpus/*.jsonl' output=gs://BUCKET/table accelerator=nvidia-l4 --max-workers=20
#
# NAME=VALUE is a flag of `embeam embed` or an option of Beam; what begins with -- goes to gcloud as it is.
set -euo pipefail

PROJECT=${PROJECT:-my-project}
REGION=${REGION:-europe-west4}
BUCKET=${BUCKET:-my-bucket}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# A tag for every version: a running job's new workers must not pull another image than its old ones.
TAG=${TAG:-$(git -C "$ROOT" describe --always --dirty --exclude='*' --abbrev=12 || true)}
REPOSITORY=embeam
IMAGE=$REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/embeam:$TAG
FOLDER=gs://$BUCKET/embeam
TEMPLATE=$FOLDER/templates/$TAG.json
# The launcher loads the encoder once, to prove the fast graph: more than the default machine's 3.75 GB.
LAUNCHER_MACHINE=${LAUNCHER_MACHINE:-n1-standard-4}

fail() {
  echo "launch.sh: $1" >&2
  exit 2
}

build() {
  (($# == 0)) || fail "build takes nothing, and was given $*"
  local repository=("$REPOSITORY" "--project=$PROJECT" "--location=$REGION")
  gcloud artifacts repositories describe "${repository[@]}" >/dev/null 2>&1 ||
    gcloud artifacts repositories create "${repository[@]}" --repository-format=docker
  gcloud builds submit "$ROOT" --project="$PROJECT" --config="$ROOT/runners/flex_template/cloudbuild.yaml" \
    --substitutions="_IMAGE=$IMAGE,_TEMPLATE=$TEMPLATE"
}

run() {
  local argument arguments=()
  for argument in "$@" "sdk_container_image=$IMAGE"; do
    case $argument in
    --*) arguments+=("$argument") ;;
    [a-z]*=*) arguments+=("--parameters=^~~^$argument") ;; # any other separator than a comma, which a value may hold
    *) fail "$argument is neither NAME=VALUE nor a flag of gcloud" ;;
    esac
  done
  gcloud dataflow flex-template run "embeam-$(date -u +%Y%m%d-%H%M%S)" --project="$PROJECT" --region="$REGION" \
    --template-file-gcs-location="$TEMPLATE" --staging-location="$FOLDER/staging" --temp-location="$FOLDER/temp" \
    --launcher-machine-type="$LAUNCHER_MACHINE" "${arguments[@]}"
}

[[ -n $TAG ]] || fail "there is no commit to name the image after; set TAG"

case ${1-} in
build | run) "$@" ;;
*) fail "say build or run" ;;
esac
