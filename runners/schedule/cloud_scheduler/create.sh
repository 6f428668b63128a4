#!/usr/bin/env bash
# Makes or changes the schedule: a Cloud Scheduler job that starts the Flex Template of runners/flex_template every night.
# main.tf beside this does the same with Terraform; what is sent, is in request.json.
set -euo pipefail

PROJECT=${PROJECT:-my-project}
REGION=${REGION:-europe-west4}
BUCKET=${BUCKET:-my-bucket}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Of the image and template that `launch.sh build` has made.
TAG=${TAG:-$(git -C "$HERE" rev-parse --short=12 HEAD)}
SCHEDULE=${SCHEDULE:-0 3 * * *}
SCHEDULER=embeam-scheduler@$PROJECT.iam.gserviceaccount.com
WORKER=embeam-worker@$PROJECT.iam.gserviceaccount.com
ADD=add-iam-policy-binding

main() {
  (($# == 0)) || {
    echo "create.sh: takes no arguments, and was given $*; PROJECT, REGION, BUCKET, TAG and SCHEDULE are variables" >&2
    exit 2
  }
  make_account "$SCHEDULER"
  make_account "$WORKER"
  grant dataflow.developer "$SCHEDULER" projects $ADD "$PROJECT"
  grant compute.viewer "$SCHEDULER" projects $ADD "$PROJECT"
  grant storage.objectViewer "$SCHEDULER" storage buckets $ADD "gs://$BUCKET"
  grant iam.serviceAccountUser "$SCHEDULER" iam service-accounts $ADD "$WORKER"
  grant dataflow.worker "$WORKER" projects $ADD "$PROJECT"
  grant storage.objectAdmin "$WORKER" storage buckets $ADD "gs://$BUCKET"
  grant artifactregistry.reader "$WORKER" artifacts repositories $ADD embeam "--location=$REGION"
  make_schedule
}

make_account() {
  gcloud iam service-accounts describe "$1" "--project=$PROJECT" >/dev/null 2>&1 ||
    gcloud iam service-accounts create "${1%@*}" "--project=$PROJECT"
}

grant() {
  local role=$1 account=$2
  shift 2
  gcloud "$@" "--project=$PROJECT" "--member=serviceAccount:$account" "--role=roles/$role" --condition=None >/dev/null
}

make_schedule() {
  local verb=update headers=--update-headers body name
  body=$(<"$HERE/request.json")
  for name in PROJECT REGION BUCKET TAG; do
    body=${body//"\${$name}"/${!name}}
  done
  gcloud scheduler jobs describe embeam "--project=$PROJECT" "--location=$REGION" >/dev/null 2>&1 ||
    verb=create headers=--headers
  gcloud scheduler jobs "$verb" http embeam "--project=$PROJECT" "--location=$REGION" \
    --schedule="$SCHEDULE" --time-zone=Etc/UTC --attempt-deadline=180s --max-retry-attempts=3 \
    --uri="https://dataflow.googleapis.com/v1b3/projects/$PROJECT/locations/$REGION/flexTemplates:launch" \
    --http-method=post "$headers=Content-Type=application/json" --message-body="$body" \
    --oauth-service-account-email="$SCHEDULER" --oauth-token-scope=https://www.googleapis.com/auth/cloud-platform
}

main "$@"
