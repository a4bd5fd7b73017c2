"""A report tells of every job of a sweep: what finished, and why the others have no figures."""

import json
from pathlib import Path

import pytest

from ditune.files.locks import attempt
from ditune.report.page import html_page, runs_table
from ditune.report.pivot import pivot
from ditune.report.results import Run, find_results, read_results
from ditune.report.status import LOCK, Job, jobs_without_result, status_of
from ditune.report.tables import NO_BEFORE, counted, markdown_table, markdown_unfinished, pivot_cell
from ditune.report.write import write_report
from run_results import write_run


def entry(folder: str | None, status: str, method: str | None, data: str | None, error: str = "") -> dict:
    overrides = [f"data={data}", f"peft={method}", "hydra.mode=RUN"]
    return {"folder": folder, "status": status, "method": method, "data": data, "error": error, "overrides": overrides}


def write_summary(folder: Path, *entries: dict) -> None:
    (folder / "summary.json").write_text(json.dumps({"jobs": list(entries)}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep in the middle of its work: one run has finished, one has failed, six jobs have no result.json."""
    write_run(tmp_path / "0", "DiffFit", 0, "a")
    write_run(tmp_path / "1", "BitFit", 0, "a", status="failed", changed={"error": "No memory.\nTraceback ..."})
    write_summary(
        tmp_path,
        entry("0", "finished", "DiffFit", "a"),
        entry("1", "failed", "BitFit", "a", "No memory."),
        entry("2", "failed", "DiffFit", "b", "rank 0: b is not in data/b.\nmore"),
        entry("3", "waiting", "BitFit", "b"),
        entry("4", "running", "Full", "a"),
        entry("5", "waiting", "Full", "b"),
        entry("6", "waiting", "DiffFit", "a"),
        entry(None, "refused", None, None, "peft=lroa: no such option."),
    )
    return tmp_path


def jobs_of(folder: Path) -> tuple[list[Run], list[Job]]:
    runs = find_results(folder)
    return runs, jobs_without_result(folder, [run.folder for run in runs])


def test_every_job_is_found_once(sweep):
    runs, jobs = jobs_of(sweep)
    assert len(runs) == 2
    assert [(job.status, job.method, job.data) for job in jobs] == [
        ("failed", "DiffFit", "b"),
        ("waiting", "BitFit", "b"),
        ("running", "Full", "a"),
        ("waiting", "Full", "b"),
        ("waiting", "DiffFit", "a"),
        ("refused", None, None),
    ]
    assert jobs[0].reason == "rank 0: b is not in data/b."
    assert jobs[0].overrides == "data=b peft=DiffFit"


def test_cells_say_why_they_have_no_figure(sweep):
    table = pivot(*jobs_of(sweep), "kid_x")
    cells = {line.label: [pivot_cell(table, line, name) for name in table.data] for line in table.lines}
    assert cells == {
        "DiffFit": ["0.3000 (1 of 2 seeds)", "failed"],
        "BitFit": ["failed", "waiting"],
        "Full": ["running", "waiting"],
    }


def test_reasons_stand_in_the_tables(sweep):
    runs, jobs = jobs_of(sweep)
    text = markdown_unfinished(runs, jobs)
    assert "- 1, BitFit on a: failed: No memory.\n" in text
    assert "- 2, DiffFit on b: failed: rank 0: b is not in data/b.\n" in text
    assert "refused: peft=lroa: no such option." in text
    html = runs_table(runs, jobs, "kid_x")
    assert html.count("<tr>") == 1 + 8
    assert "No memory." in html
    assert "Traceback" not in html + text
    page = html_page(sweep, runs, jobs, None)
    assert "1 of 8 jobs have finished, 2 failed, 3 waiting, 1 running, 1 refused." in page


def test_a_sweep_that_failed_before_any_training_has_a_report_too(tmp_path):
    write_summary(tmp_path, entry("0", "failed", "DiffFit", "a", "a is not in data/a."))
    assert "- 0, DiffFit on a: failed: a is not in data/a." in write_report(tmp_path)
    assert "a is not in data/a." in (tmp_path / "report.html").read_text()


def test_who_holds_no_lock_does_not_run(tmp_path):
    running = {"status": "running"}
    assert status_of(tmp_path, running) == ("running", "")  # no lock to ask: results that were copied
    with attempt(tmp_path / LOCK) as mine:
        assert mine
        assert status_of(tmp_path, running)[0] == "running"
        assert status_of(tmp_path, {"status": "trained"}) == ("running", "the training is done, the evaluation is not")
    status, reason = status_of(tmp_path, running)
    assert status == "killed"
    assert "no process is at work" in reason


def test_a_sweep_that_died_runs_no_jobs(sweep):
    (sweep / LOCK).touch()
    statuses = {job.folder and job.folder.name: (job.status, job.reason) for job in jobs_of(sweep)[1]}
    assert statuses["4"] == ("killed", "its sweep is not running; the same command goes on with it")
    assert statuses["3"] == ("waiting", "its sweep is not running; the same command goes on with it")
    assert statuses["2"][0] == "failed"


def test_a_stopped_run_says_how_far_it_came(tmp_path):
    result = {"status": "stopped", "steps": 1200, "max_steps": 24_000}
    assert status_of(tmp_path, result) == ("stopped", "after step 1,200 of 24,000; resume=auto goes on with it")


def test_no_loss_before_has_a_reason(tmp_path):
    write_run(tmp_path / "0", "DiffFit", 0, changed={"denoising": {"after": 0.5}}, config={"classes": "reinit"})
    write_run(tmp_path / "1", "BitFit", 0, changed={"denoising": {"after": 0.5}}, config={"classes": "mean"})
    header, _, difffit, bitfit = markdown_table(read_results(tmp_path)).splitlines()
    place = [title.strip() for title in header.split("|")].index("test loss before")
    assert difffit.split("|")[place].strip() == NO_BEFORE
    assert bitfit.split("|")[place].strip() == "not run"


def test_statuses_are_counted():
    assert counted([]) == "not run"
    assert counted(["failed"]) == "failed"
    assert counted(["failed", "waiting", "failed"]) == "2 failed, 1 waiting"
