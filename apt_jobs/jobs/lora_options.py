"""What a job says of a low-rank adapter, by the names of `peft`."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from apt_jobs.jobs.strict_model import Strict

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,199}$")]


class LoraOptions(Strict):
    """LoRA (Hu et al. 2021): train two thin matrices beside each chosen layer, and leave the base model as it is."""

    r: int = Field(16, ge=1, le=4_096, description="Rank of the matrices.")
    alpha: float = Field(32.0, gt=0.0, le=65_536.0, description="Scale of what they add: alpha / r.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout of their input.")
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=1_000)] | Literal["all-linear"] = Field(
        "all-linear",
        description="Layers by the end of their names, as `q_proj`; all-linear: every linear one but the output's.",
    )
    use_dora: bool = Field(False, description="DoRA (Liu et al. 2024): train the length of each row apart.")
    use_rslora: bool = Field(False, description="rsLoRA (Kalajdzievski 2023): scale by alpha / sqrt(r).")
    quantization: Literal["nf4"] | None = Field(
        None,
        description="nf4: QLoRA (Dettmers et al. 2023), the base model's weights in 4 bits while the adapter trains; "
        "needs bitsandbytes on the worker. null: as they are.",
    )
