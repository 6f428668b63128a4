# Makes or changes the schedule, as create.sh beside this does with gcloud; what is sent, is in request.json:
# terraform init && terraform apply -var=tag="$(git rev-parse --short=12 HEAD)"

variable "project" {
  type    = string
  default = "my-project"
}

variable "region" {
  type    = string
  default = "europe-west4"
}

variable "bucket" {
  type    = string
  default = "my-bucket"
}

variable "tag" {
  type        = string
  description = "Of the image and template that `launch.sh build` has made: the commit, in 12 digits."
}

variable "schedule" {
  type    = string
  default = "0 3 * * *"
}

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 5.0, < 8.0"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

locals {
  request = templatefile("${path.module}/request.json", {
    PROJECT = var.project
    REGION  = var.region
    BUCKET  = var.bucket
    TAG     = var.tag
  })
}

resource "google_service_account" "scheduler" {
  account_id = "embeam-scheduler"
}

resource "google_service_account" "worker" {
  account_id = "embeam-worker"
}

resource "google_project_iam_member" "scheduler" {
  for_each = toset(["roles/dataflow.developer", "roles/compute.viewer"])
  project  = var.project
  role     = each.value
  member   = google_service_account.scheduler.member
}

resource "google_storage_bucket_iam_member" "scheduler" {
  bucket = var.bucket
  role   = "roles/storage.objectViewer"
  member = google_service_account.scheduler.member
}

resource "google_service_account_iam_member" "scheduler" {
  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.scheduler.member
}

resource "google_project_iam_member" "worker" {
  project = var.project
  role    = "roles/dataflow.worker"
  member  = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker" {
  bucket = var.bucket
  role   = "roles/storage.objectAdmin"
  member = google_service_account.worker.member
}

resource "google_artifact_registry_repository_iam_member" "worker" {
  location   = var.region
  repository = "embeam"
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.worker.member
}

resource "google_cloud_scheduler_job" "embeam" {
  name             = "embeam"
  schedule         = var.schedule
  time_zone        = "Etc/UTC"
  attempt_deadline = "180s"

  retry_config {
    retry_count = 3
  }

  http_target {
    http_method = "POST"
    uri         = "https://dataflow.googleapis.com/v1b3/projects/${var.project}/locations/${var.region}/flexTemplates:launch"
    headers     = { "Content-Type" = "application/json" }
    body        = base64encode(local.request)

    oauth_token {
      service_account_email = google_service_account.scheduler.email
      scope                 = "https://www.googleapis.com/auth/cloud-platform"
    }
  }
}
