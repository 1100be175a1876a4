"""A nightly `fusion run` in Airflow 2 (in 3 the operator is in airflow.providers.standard.operators.bash).

Skipped where another run is at work, tried again where it failed.
"""

from datetime import datetime, timedelta

from airflow import DAG
from airflow.operators.bash import BashOperator

with DAG(
    dag_id="fusion_run",
    schedule="17 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,  # a run does all that is new, whatever was missed
    max_active_runs=1,
):
    BashOperator(
        task_id="run",
        bash_command="exec /opt/fusion/bin/fusion run /srv/corpus/job.toml --quiet",
        skip_on_exit_code=5,
        retries=2,
        retry_delay=timedelta(minutes=10),
        append_env=True,
    )
