"""How the rows of a data set become what a training sees."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from apt_jobs.jobs.strict_model import Strict

MAX_TEMPLATE_CHARS = 100_000


class DataOptions(Strict):
    """How rows of conversations, completions and preferences become sequences. Plain text needs none of it."""

    chat_template: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEMPLATE_CHARS)] | None = Field(
        None, description="Jinja template that writes conversations; checkpoints keep it. null: the model's own."
    )
    train_on: Literal["answers", "everything"] = Field(
        "answers", description="answers: the loss is that of answers and completions; everything: of prompts, too."
    )
    longer_than_context: Literal["refuse", "skip", "truncate"] = Field(
        "refuse", description="What to do with examples that are longer than the context: name them and fail, or go on."
    )
    packing: bool = Field(
        True,
        description="Put several examples into a sequence; none attends to another. false: each has one of its own.",
    )
    separate_documents: bool = Field(
        False,
        description="Of text: no token attends to another document, as if each had a sequence of its own. false: a "
        "sequence is read as one text, which is faster on GPUs.",
    )
