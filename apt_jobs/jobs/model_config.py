"""The size of a language model that is trained from nothing."""

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from apt_jobs.jobs.strict_model import Strict


class APTConfig(Strict):
    """Size of the language model. Built as a Hugging Face `LlamaForCausalLM`.

    Args:
        **fields: The fields below, each with its default and bounds.

    Raises:
        ValidationError: a field is unknown or out of bounds, or the heads do not divide the width.

    Example:
        config = APTConfig(d_model=256, num_layers=6, num_attention_heads=8)
        print(config.num_parameters)
    """

    # REST documents it by its first line, not by what Python programs need.
    model_config = ConfigDict(json_schema_extra={"description": "Size of the language model, a `LlamaForCausalLM`."})

    d_model: int = Field(128, ge=8, le=16_384, description="Width of the residual stream.")
    num_layers: int = Field(4, ge=1, le=200, description="Number of transformer blocks.")
    num_attention_heads: int = Field(4, ge=1, le=256, description="Attention heads; must divide d_model.")
    num_key_value_heads: int | None = Field(None, ge=1, le=256, description="Grouped heads; default: as many as heads.")
    d_ff: int | None = Field(None, ge=8, le=131_072, description="Width of the MLP; default: 8/3 d_model.")
    vocab_size: int = Field(2_048, ge=260, le=262_144, description="Size of the byte-level BPE vocabulary.")
    max_seq_len: int = Field(128, ge=8, le=131_072, description="Longest sequence, in tokens.")
    rope_theta: float = Field(
        10_000.0, ge=1.0, le=1e9, description="Base of the rotary position embedding; larger for longer sequences."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout of the attention weights.")
    tie_embeddings: bool = Field(True, description="Share the input and output embedding.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.num_attention_heads or (self.d_model // self.num_attention_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} must be an even multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_parameters > 200_000_000_000:
            raise ValueError(f"the model would have {self.num_parameters:,} parameters; at most 200,000,000,000")
        return self

    @property
    def feed_forward_size(self) -> int:
        return self.d_ff or (self.d_model * 8 // 3 + 7) // 8 * 8

    @property
    def num_parameters(self) -> int:
        """Parameters of the Llama model that this configuration builds."""
        key_value_size = (
            self.d_model // self.num_attention_heads * (self.num_key_value_heads or self.num_attention_heads)
        )
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * key_value_size
        block = attention + 3 * self.d_model * self.feed_forward_size + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + self.d_model
