"""Prints what was promised for faults, how each fault is injected, and what happened when its tests ran.

    python benchmarks/faults.py                   # all rows; about five minutes of two cores
    python benchmarks/faults.py R3 R9             # some of them

Each row names the tests that inject its fault for real. They run in one pytest process for each test file, one after
the other. A row holds when all of its tests pass; tests that this machine skips are counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A promise and the tests that try it.

    Args:
        name: R1 to R18, or "-" for what has no number.
        promise: what must hold.
        fault: what the tests inject.
        tests: files below tests/, each with the names of tests in it.
    """

    name: str
    promise: str
    fault: str
    tests: Mapping[str, Sequence[str]]


ROWS = (
    Row(
        "R1",
        "A resumed run ends with the bits of one that was never stopped.",
        "SIGTERM or an exception in a step, for methods, objectives, experts and Muon",
        {
            "training/test_resume.py": ("test_stopped_by_a_signal_and_resumed", "test_crashed_and_resumed_twice"),
            "peft/test_peft_modes.py": ("test_it_goes_on_as_if_it_had_never_stopped",),
            "objectives/test_shortcut.py": ("test_teachers_and_averages_survive_a_resume",),
            "moe/test_balance.py": ("test_metrics_checkpoints_and_resume",),
            "training/test_muon.py": ("test_training_goes_on_from_a_checkpoint_to_the_bit",),
            "training/test_validation.py": ("test_stopped_by_a_signal_and_resumed",),
        },
    ),
    Row(
        "R2",
        "One rank with a batch of 8 and two with 4 each train alike, and log the same losses.",
        "the same training by one and by two processes",
        {
            "faults/test_ranks.py": ("test_the_log_of_two_ranks_is_that_of_one",),
            "training/test_ddp.py": (
                "test_two_processes_learn_as_one",
                "test_two_processes_learn_as_one_by_every_objective_and_with_experts",
            ),
            "data/test_draws_and_stream.py": ("test_a_step_covers_the_same_positions_whoever_takes_part",),
        },
    ),
    Row(
        "R3",
        "SIGKILL at any moment: the same command goes on, and loses no weight, line or sample grid.",
        "SIGKILL at, behind and after a checkpoint; at random moments by `benchmarks/kills.py`",
        {
            "faults/test_kills.py": (
                "test_a_kill_at_a_checkpoint_loses_no_line",
                "test_a_kill_before_the_last_sample_grid_loses_none",
            )
        },
    ),
    Row(
        "R4",
        "SIGKILL while a checkpoint is written leaves the one before it whole.",
        "SIGKILL when half of the file is there",
        {
            "faults/test_kills.py": ("test_a_kill_at_a_checkpoint_loses_no_line",),
            "training/test_resume.py": (
                "test_a_save_that_dies_leaves_the_old_file",
                "test_a_process_killed_while_it_saves_leaves_the_old_file",
            ),
        },
    ),
    Row(
        "R5",
        "A full disk ends in a sentence, result.json is true, and no checkpoint is lost.",
        "small file systems that are full at a checkpoint, a log line, a sample grid, from the start",
        {
            "faults/test_disks.py": (
                "test_a_full_disk_stops_the_training_and_loses_nothing",
                "test_a_training_goes_on_where_that_is_asked_for",
                "test_a_disk_that_is_full_from_the_start_is_a_sentence",
                "test_a_file_that_the_system_refuses",
                "test_a_log_file_on_a_full_disk_says_it_once",
                "test_tensorboard_on_a_full_disk_says_it_once",
            ),
            "data/test_prepare.py": ("test_a_full_disk_leaves_nothing_that_passes_for_whole",),
        },
    ),
    Row(
        "R6",
        "The newest valid checkpoint is taken; damaged files are said and never begin a run anew.",
        "cut, flipped, foreign and malicious checkpoints, other shapes, damaged side files, none left",
        {
            "faults/test_checkpoints.py": (
                "test_damaged_and_foreign_ones_are_rejected_with_a_reason_and_the_newest_valid_one_is_taken",
                "test_without_a_valid_one_the_run_does_not_begin_anew",
                "test_a_run_whose_checkpoints_are_gone_does_not_begin_anew",
                "test_damaged_side_files_are_set_aside",
                "test_two_valid_ones_stay_beside_damaged_ones",
                "test_never_fewer_than_two_are_kept",
            ),
            "faults/test_kills.py": ("test_best_weights_that_are_damaged_are_none",),
            "training/test_resume.py": ("test_damaged_newest_checkpoint_falls_back",),
        },
    ),
    Row(
        "R7",
        "No file or folder of a stranger runs code or writes outside of its place.",
        "pickles in every container, run folders that call other classes, archives with names that lead out",
        {
            "checkpoints/test_foreign_pickles.py": (
                "test_nothing_in_a_pickle_is_executed",
                "test_hand_made_pickles_are_not_executed",
            ),
            "objectives/test_shortcut_parity.py": ("test_code_in_a_pickle_is_not_executed",),
            "commands/test_run.py": (
                "test_the_bomb_is_one",
                "test_a_run_folder_of_a_stranger_runs_nothing",
                "test_every_entry_point_refuses_it",
                "test_a_report_reads_configs_as_text",
                "test_upcycling_runs_nothing",
                "test_a_prepared_folder_runs_nothing",
                "test_a_resumed_run_runs_nothing",
            ),
            "data/test_archives.py": (
                "test_entries_that_leave_the_folder_are_refused",
                "test_zip_entries_that_leave_the_folder_are_refused",
            ),
        },
    ),
    Row(
        "R8",
        "Broken, missing and replaced images are named, and left out only where that is asked for.",
        "broken and missing image files, before and behind the manifest; a flipped bit in a zip file",
        {
            "data/test_prepare.py": (
                "test_a_broken_image_stops_or_is_left_out",
                "test_a_missing_image_is_reported_and_its_return_noticed",
                "test_labels_or_splits_that_changed_make_the_manifest_stale",
            ),
            "data/test_images.py": (
                "test_broken_image_is_named",
                "test_flipped_bit_in_a_zip_is_noticed",
                "test_absurdly_large_image_is_a_sentence",
            ),
        },
    ),
    Row(
        "R9",
        "SIGTERM, SIGINT, SIGUSR1 and SIGHUP: saved once, 128 + signal on every rank, within ten seconds.",
        "signals at each moment of a training, to one or all of one and two ranks, and twice",
        {
            "faults/test_signals.py": (
                "test_one_process",
                "test_the_same_command_goes_on_to_the_same_bits",
                "test_a_second_signal_ends_it_at_once",
                "test_two_ranks_of_which_one_hears_it",
                "test_no_rank_outlives_a_start_that_is_stopped",
            ),
            "training/test_ddp.py": ("test_two_processes_stopped_by_a_signal_and_resumed",),
        },
    ),
    Row(
        "R10",
        "An error of one rank ends all of them, and result.json says rank and cause.",
        "an exception, a hang and SIGKILL on rank 1, and an exception before the training",
        {
            "faults/test_ranks.py": (
                "test_the_error_of_another_rank_is_the_cause",
                "test_a_rank_that_fails_before_the_training_is_the_cause",
                "test_a_rank_that_hangs_ends_the_others",
                "test_a_killed_rank_ends_the_first_one_by_the_launcher",
            ),
        },
    ),
    Row(
        "R11",
        "A loss or gradient that is not finite stops all ranks before the update, and names rank, image and tensor.",
        "NaN in one image, on one rank of one and of two; the same with steps that are skipped",
        {
            "faults/test_nonfinite.py": (
                "test_it_stops_with_rank_image_and_tensor",
                "test_a_skipped_step_changes_nothing",
                "test_too_many_skipped_steps_stop_it",
                "test_two_ranks_skip_together",
            ),
        },
    ),
    Row(
        "R12",
        "A sweep outlives failing and killed jobs, says why each has failed, and leaves no process behind.",
        "a job that fails on rank 1, a job that is killed, SIGKILL and signals to the sweep",
        {
            "launch/test_sweeps.py": (
                "test_one_of_four_jobs_fails_on_rank_1_and_one_is_killed",
                "test_nothing_outlives_a_sweep_that_is_killed",
                "test_a_stopped_sweep_says_what_became_of_its_jobs",
                "test_a_sweep_that_is_stopped_shows_its_table",
            ),
        },
    ),
    Row(
        "R13",
        "The first 20 losses of every method, kind of network and objective are those written down.",
        "111 trainings against tests/golden/losses.json; a changed rate, scale, weight and share",
        {
            "training/test_golden_losses.py": (
                "test_the_first_losses_are_those_written_down",
                "test_the_tolerance_tells_methods_and_objectives_apart",
                "test_a_changed_formula_is_noticed",
            )
        },
    ),
    Row(
        "R14",
        "Ranks whose weights drift apart are noticed.",
        "one weight of rank 1 is changed between two steps",
        {"faults/test_ranks.py": ("test_ranks_that_drift_apart_are_stopped", "test_one_bit_changes_the_checksum")},
    ),
    Row(
        "R15",
        "Only what a method declares changes, and its file gives the network back.",
        "one training of each method on a base without gates of zero",
        {"peft/test_peft.py": ("test_only_what_it_declares_has_changed", "test_files_give_it_back")},
    ),
    Row(
        "R16",
        "An evaluation by several processes has the figures of one, and a lost process ends it.",
        "one and four processes; ranks that die, are killed, or never come",
        {
            "evaluation/test_evaluate.py": ("test_one_and_four_processes_give_the_same",),
            "evaluation/test_together.py": (
                "test_a_rank_that_dies_ends_those_that_wait_for_it",
                "test_a_rank_that_never_comes_is_waited_for_so_long",
                "test_two_ranks_evaluate_as_one_process_killed_stopped_and_gone_on_with",
            ),
        },
    ),
    Row(
        "R17",
        "Several `prepare.py` at once make one cache, also where one of them is killed.",
        "two that start together, pieces of a process that is gone, an encoding that is stopped",
        {
            "data/test_prepare.py": (
                "test_two_that_start_at_once_make_one_cache",
                "test_pieces_are_shared_and_those_of_the_dead_are_taken_up",
                "test_an_encoding_that_was_stopped_goes_on",
            ),
        },
    ),
    Row(
        "R18",
        "A resume with other settings is refused where they change the result, and says what differs.",
        "other methods, data, micro-batches, schedules and numbers of steps",
        {
            "faults/test_kills.py": (
                "test_statistics_of_the_routing_survive_and_other_micro_batches_are_refused",
                "test_a_longer_training_of_a_decaying_rate_is_said",
            ),
            "faults/test_checkpoints.py": ("test_a_refusal_names_the_keys_that_differ",),
            "training/test_resume.py": (
                "test_checkpoint_of_another_run_is_refused",
                "test_fewer_steps_than_a_run_has_behind_it_are_refused",
            ),
        },
    ),
    Row(
        "-",
        "One run folder has one writer.",
        "two starts in one folder, the first of which dies",
        {
            "launch/test_paths.py": (
                "test_a_second_run_in_a_folder_is_refused_until_the_first_dies",
                "test_two_starts_in_one_folder_leave_one_whole_run",
                "test_locks",
            ),
        },
    ),
    Row(
        "-",
        "A folder that cannot be written is a sentence.",
        "read-only file systems and paths that are none, at the start and in the middle",
        {
            "faults/test_disks.py": ("test_a_folder_that_becomes_read_only",),
            "launch/test_paths.py": ("test_a_run_folder_that_cannot_be_is_a_sentence",),
        },
    ),
    Row(
        "-",
        "Wrong overrides and damaged files end in a sentence.",
        "overrides and bytes that hypothesis changes",
        {"faults/test_fuzz.py": ("test_overrides", "test_bytes")},
    ),
    Row(
        "-",
        "No file, line or message holds a key of W&B or Hugging Face, or what an address hides.",
        "keys in the environment, and in addresses that answer, break off and are missing",
        {
            "files/test_download.py": (
                "test_keys_in_an_address_reach_the_server_and_nobody_else",
                "test_what_is_shown_of_an_address",
            ),
            "training/test_loggers.py": ("test_wandb_goes_on_in_the_same_run_and_shows_failures",),
        },
    ),
)


@dataclass
class Outcome:
    """What became of one test with all of its cases.

    Args:
        counts: of "passed", "failed" and "skipped" cases.
        reason: first line of the first failure, or "".
    """

    counts: Counter[str]
    reason: str


def run_file(path: str, tests: Sequence[str]) -> dict[str, Outcome]:
    """Run tests of a file below tests/ in one pytest process; the outcome of each that is there, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        nodes = [f"tests/{path}::{test}" for test in tests if f"def {test}(" in _text(path)]
        if not nodes:
            return {}
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *nodes]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
        outcomes: dict[str, Outcome] = {}
        for case in cases:
            outcome = outcomes.setdefault(case.attrib["name"].partition("[")[0], Outcome(Counter(), ""))
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            kind = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
            outcome.counts[kind] += 1
            if bad is not None:
                outcome.reason = outcome.reason or bad.attrib.get("message", "").split("\n")[0]
        return outcomes


def _text(path: str) -> str:
    file = ROOT / "tests" / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def verdict(row: Row, outcomes: Mapping[tuple[str, str], Outcome]) -> tuple[str, str]:
    """(what happened, holds | fails | not covered | not run) of a row."""
    if not row.tests:
        return "-", "not covered"
    counts, reasons, lacking = Counter[str](), [], []
    for path, tests in row.tests.items():
        for test in tests:
            outcome = outcomes.get((path, test))
            if outcome is None:
                lacking.append(test)
                continue
            counts += outcome.counts
            reasons += [f"{test}: {outcome.reason}"] if outcome.reason else []
    said = [f"{counts['passed']} of {sum(counts.values())} cases pass"]
    said += [f"{counts['skipped']} are skipped here"] if counts["skipped"] else []
    said += [f"not found: {', '.join(lacking)}"] if lacking else []
    said += reasons[:1]
    holds = not counts["failed"] and not lacking and counts["passed"]
    word = "holds" if holds else "fails" if counts["failed"] or lacking else "not run"
    return "; ".join(said).replace("|", "\\|"), word


def table(rows: Sequence[Row], outcomes: Mapping[tuple[str, str], Outcome]) -> str:
    """The rows as a Markdown table."""
    lines = ["| # | promise | injected | what happened | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        happened, word = verdict(row, outcomes)
        lines.append(f"| {row.name} | {row.promise} | {row.fault} | {happened} | {word} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run and print; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="R<n>", help="rows; default: all")
    names = parser.parse_args().names
    rows = [row for row in ROWS if not names or row.name in names]
    asked: dict[str, dict[str, None]] = {}  # tests by their file, each once
    for row in rows:
        for path, tests in row.tests.items():
            asked.setdefault(path, {}).update(dict.fromkeys(tests))
    outcomes = {
        (path, test): outcome
        for path, tests in sorted(asked.items())
        for test, outcome in run_file(path, list(tests)).items()
    }
    sys.stdout.write(table(rows, outcomes))
    return int(any(verdict(row, outcomes)[1] == "fails" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
