"""Files of a run on a cluster: what it writes outlives its job, and every node sees what its workers read and write."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.run.command_line import one_line
from perception.errors import UserError
from runtime import cluster


def check_kept(output: str) -> None:
    """Raises UserError for a relative `run.output` in a job's uploaded working directory, which goes with the job."""
    if "working_dir" in cluster.submitted() and not Path(output).is_absolute():
        gone = "lies in the uploaded working directory, which Ray deletes with the job"
        raise UserError(f"run.output={output} {gone}; give an absolute path that every node shares")


def check_nodes(nodes: Iterable[str], models: Mapping[str, str], run_dir: Path | None, limit_s: float) -> None:
    """Let every node, by its id, look for models and data, by their setting, and for a new file in the run's directory.

    Raises UserError naming the first node that misses one, or has not answered within `limit_s`.
    """
    names = {one["NodeID"]: f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})" for one in ray.nodes()}
    look = ray.remote(num_cpus=0)(unseen)
    with NamedTemporaryFile(dir=run_dir.resolve(), prefix=".token-") if run_dir else nullcontext() as token:
        wanted = {**models, "run.output": token.name} if token else models
        late = f"did not say within {limit_s:g} s (placement.start_timeout_s) whether it sees {', '.join(wanted)}"
        there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
        asked = {node: look.options(scheduling_strategy=where).remote(wanted) for node, where in there.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=limit_s)  # all at once; then each has its say
        for node, answer in asked.items():
            try:
                missed = ray.get(answer, timeout=0)
            except GetTimeoutError as error:
                raise UserError(f"node {names[node]} {late}") from error
            except RayError as error:
                raise UserError(f"node {names[node]} cannot run this program: {one_line(error)}") from error
            if missed:
                cure = "it must be there under the same path, as on a file system that all nodes share"
                raise UserError(f"node {names[node]} does not see {missed[0]}: {cure}")


def unseen(wanted: Mapping[str, str]) -> list[str]:
    """Those of the paths, by setting, that are not on this node."""
    return [f"{key}={path}" for key, path in wanted.items() if not Path(path).exists()]
