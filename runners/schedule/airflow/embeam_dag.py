"""A DAG that starts the Flex Template of runners/flex_template every night and waits for its job.

Copy it to Airflow's folder of DAGs and change the three names. It needs Airflow 3 with the packages
apache-airflow-providers-google and apache-airflow-providers-apache-beam, and the service account that the job runs as.
"""

import datetime

from airflow.providers.google.cloud.operators.dataflow import DataflowStartFlexTemplateOperator
from airflow.sdk import DAG

PROJECT = "my-project"
REGION = "europe-west4"
BUCKET = "my-bucket"
# Of the image and template that `launch.sh build` has made: the commit, in 12 digits. airflow variables set embeam_tag
# names another.
TAG = "{{ var.value.embeam_tag }}"

REQUEST = {
    "launchParameter": {
        "jobName": "embeam-table",
        "containerSpecGcsPath": f"gs://{BUCKET}/embeam/templates/{TAG}.json",
        "parameters": {
            "input": f"gs://{BUCKET}/corpus/*.jsonl",
            "output": f"gs://{BUCKET}/table",
            "id_field": "id",
            "sdk_container_image": f"{REGION}-docker.pkg.dev/{PROJECT}/embeam/embeam:{TAG}",
        },
        "environment": {
            "serviceAccountEmail": f"embeam-worker@{PROJECT}.iam.gserviceaccount.com",
            "stagingLocation": f"gs://{BUCKET}/embeam/staging",
            "tempLocation": f"gs://{BUCKET}/embeam/temp",
            "launcherMachineType": "n1-standard-4",
            "maxWorkers": 20,
        },
    }
}

with DAG(
    dag_id="embeam",
    schedule="0 3 * * *",
    start_date=datetime.datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    DataflowStartFlexTemplateOperator(
        task_id="embed",
        project_id=PROJECT,
        location=REGION,
        body=REQUEST,
        append_job_name=False,  # Dataflow has one job of a name at a time
        deferrable=True,  # waits without a worker of Airflow's
        # Another try goes on from what the last one had finished. A failed job keeps its table for two hours.
        retries=2,
        retry_delay=datetime.timedelta(minutes=125),
    )
