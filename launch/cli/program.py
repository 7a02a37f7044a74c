"""The outermost level of every program: arguments in, exit code out; only rank 0 prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import hydra
from omegaconf import DictConfig

from ...engine.errors import ConfigError
from ..ranks.failure import report_failure
from ..ranks.process import (
    STOP_TIMEOUT_S,
    OutputLost,
    Signalled,
    die_on_signals,
    end_with_parent,
    exit_within,
    stop_on_signals,
    watch_streams,
)
from ..ranks.rank_info import RankInfo, read_rank_info
from .compose import CONFIG_NAME, HYDRA_VERSION_BASE, Job, compose, job_of, parse_arguments, prepare_arguments, redact
from .help import help_text
from .presets import CONFIGS
from .schema import Keys

K = TypeVar("K", bound=Keys)


def run_program(keys: type[K], body: Callable[[Job[K]], int], program: str, about: str) -> NoReturn:
    """Compose the configuration from sys.argv, call `body` with it, and exit with the code it returns.

    Exit codes: 0, or body's; 2 for a configuration or checkpoint that cannot be used; 1 for any other failure;
    128 + signal. Under torchrun every rank runs this; a rank other than 0 prints only how it failed.
    """
    watch_streams()
    try:
        rank_info = read_rank_info()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    if rank_info.launched:
        end_with_parent()
    signals: list[int] = []
    if rank_info.rank == 0:
        signals = stop_on_signals()
    else:
        die_on_signals()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)

    try:
        arguments = prepare_arguments(sys.argv[1:], keys, rank_info)
        if parse_arguments(arguments).help:
            print(help_text(keys, program, about))
            code = 0
        else:
            code = _run_body(arguments, keys, body, rank_info)
        sys.stdout.flush()  # here, where a failure is told in one line
    except (Exception, Signalled, OutputLost) as error:
        # Of the signal's exception a library may have made an error of its own: nobody wants to read that.
        code = 128 + signals[0] if signals else report_failure(error, rank_info)

    exit_within(STOP_TIMEOUT_S, code)
    sys.exit(code)


def run_tool(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Call a program's `main` that reads its arguments by itself, and exit with the code it returns.

    A signal and standard output that cannot be written end it as they end the programs of run_program.
    """
    watch_streams()
    signals = stop_on_signals()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except (Exception, Signalled, OutputLost) as error:
        code = 128 + signals[0] if signals else report_failure(error, RankInfo())
    sys.exit(code)


def _run_body(arguments: list[str], keys: type[K], body: Callable[[Job[K]], int], rank_info: RankInfo) -> int:
    composed = compose(arguments, keys, rank_info)  # first, because Hydra's own message for a mistake is long
    if parse_arguments(arguments).cfg:
        arguments = redact(arguments, composed)
    job = _through_hydra(arguments, keys)
    return 0 if job is None else body(job)


def _through_hydra(arguments: list[str], keys: type[K]) -> Job[K] | None:
    """Run Hydra's command line. Returns the job, or None if the command was only to print something."""
    rank_info = read_rank_info()
    jobs: list[Job[K]] = []
    sys.argv[1:] = arguments
    if parse_arguments(arguments).multirun:
        raise ConfigError("--multirun is not supported: an engine is built for one configuration at a time")

    def take(config: DictConfig) -> None:
        jobs.append(job_of(config, keys, rank_info))

    hydra.main(config_path=str(CONFIGS), config_name=CONFIG_NAME, version_base=HYDRA_VERSION_BASE)(take)()
    return jobs[0] if jobs else None
