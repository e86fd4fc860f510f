"""A plugin as a user writes it: a task with its own grammar, a reward component, a reader and a policy loss.

python -m launch.train --config-dir my_perception/conf recipe=mine plugins=[my_perception]
"""

from __future__ import annotations

from perception.registry import import_all

import_all(__name__)
