"""A script on `accelerate` as a job: what it logs becomes metrics of the job.

    accelerator = Accelerator(log_with=RunTracker())
    accelerator.init_trackers("mine", config={"lr": 3e-4})
    accelerator.log({"loss": loss, "eval/bleu": bleu}, step=step)

It uses `apt_jobs.current_run()` and nothing else of the service; `tracker` is that run, for checkpoints and stops.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from apt_jobs.run.current import Run, current_run


class RunTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """A tracker of `accelerate` that logs to the job; the main process alone does."""

    name = "apt_jobs"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()
        self._run = run if run is not None else current_run()

    @property
    def tracker(self) -> Run:
        """The run of the job, as `accelerator.get_tracker("apt_jobs", unwrap=True)` returns it."""
        return self._run

    @on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the configuration of `init_trackers` to the job's log: a job's own settings are in its spec."""
        words = " ".join(f"{name}={value}" for name, value in values.items())
        self._run.log_text(f"configuration: {words}")

    @on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers, `{"losses": {"a": 1.0}}` as `losses/a`; what is text goes to the job's log."""
        numbers: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, str):
                self._run.log_text(f"{name}: {value}")
            elif isinstance(value, Mapping):
                numbers |= {f"{name}/{part}": number for part, number in value.items()}
            else:
                numbers[name] = value
        if numbers:
            self._run.log(numbers, step=step)

    @on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images; of a list of images each one."""
        for name, images in values.items():
            for image in images if isinstance(images, list | tuple) else [images]:
                self._run.log_image(name, image, step=step)

    @on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a table of rows or a data frame."""
        table = dataframe if dataframe is not None else data or []
        self._run.log_table(table_name, table, step=step, columns=columns if dataframe is None else None)

    @on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def finish(self) -> None:
        """Write what waits for its turn."""
        self._run.flush()
