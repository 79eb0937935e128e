"""How long the sequences of a training are."""

from typing import Any

from transformers import PretrainedConfig

from apt_jobs.jobs.run_file import RunFile


def context_length(run_file: RunFile) -> int:
    """Return the tokens of a sequence: `model.max_seq_len`, or fewer if the model that is started from has fewer."""
    wanted = run_file.spec.model.max_seq_len
    is_adapter = run_file.spec.training.lora is not None  # its checkpoints have no configuration of their own
    source = run_file.base_model_dir if is_adapter else run_file.resume_dir or run_file.base_model_dir
    if source is None:
        return wanted
    fields: dict[str, Any]
    fields, _ = PretrainedConfig.get_config_dict(source)
    longest = fields.get("max_position_embeddings") or fields.get("n_positions")  # Bloom and Mamba have neither
    return min(wanted, longest) if isinstance(longest, int) else wanted
