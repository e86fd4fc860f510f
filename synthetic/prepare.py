"""Preparation of a run: makes the synthetic world and the random-weight policy that a recipe asks for, if absent.

Of several runs that start at once each makes its own, and the first to be ready is everybody's.
"""

from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from launch.run.config import CONF
from perception.config import Config, DataConfig, ModelConfig, TaskConfig
from perception.errors import UserError
from perception.files import replacing


def prepare(config: Config, say: Callable[[str], None]) -> None:
    """Raises UserError for a world that would stand in two folders, or among other files."""
    if config.data.world_side is not None and not Path(config.data.train).exists():
        _world(config.data, config.data.world_side, say)
    if config.model.shape is not None and not Path(config.model.path).exists():
        _random_policy(config.model, config.model.shape, say)


def _world(data: DataConfig, side: int, say: Callable[[str], None]) -> None:
    from synthetic import world

    out = Path(data.train).parent
    if (Path(data.train), Path(data.eval)) != (out / "train.json", out / "eval.json"):
        files = "train.json and eval.json into one folder"
        raise UserError(f"data.world_side writes {files}, not {data.train} and {data.eval}")
    if out.is_dir() and any(out.iterdir()) and not Path(data.train).exists():
        raise UserError(f"data.train={data.train}: {out} holds other files; remove them, or name another folder")
    say(f"writing the synthetic world to {out}")
    with replacing(out, shared=True) as folder:
        world.write(folder, train=data.world_train, side=side)


def _random_policy(model: ModelConfig, shape: str, say: Callable[[str], None]) -> None:
    from synthetic import policies
    from synthetic.policy import corpus
    from synthetic.scenes import SceneStyle

    say(f"writing a random-weight policy of shape {shape} to {model.path}")
    tokenizer = policies.make_tokenizer(corpus(SceneStyle(), read_tasks("brief")))
    random = policies.make_model(policies.SHAPES[shape], tokenizer, seed=0)
    with replacing(Path(model.path), shared=True) as folder:
        policies.save(random, tokenizer, folder, policies.SHAPES[shape].max_side)


def read_tasks(name: str) -> dict[str, TaskConfig]:
    """The task templates of `conf/task/<name>.yaml`."""
    tree = OmegaConf.to_container(OmegaConf.load(CONF / "task" / f"{name}.yaml"), resolve=True)
    return TypeAdapter(dict[str, TaskConfig]).validate_python(tree)
