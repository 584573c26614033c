"""A config that this process trains in a second."""

import pytest

from gshardx.config import CheckpointConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from gshardx.sharding import MeshConfig


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{word} {"to be or not to be " * 6}"}}\n' for word in "abcdefghij"))
    return Config(
        model=ModelConfig(
            layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, moe=MoEConfig(num_experts=4, hidden=8)
        ),
        mesh=MeshConfig(data=2, expert=4),
        data=DataConfig(path=str(text), tokenizer="bytes", sequence_length=16),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=8, batch_size=8, sample_tokens=0),
        checkpoint=CheckpointConfig(every=3),
    )
