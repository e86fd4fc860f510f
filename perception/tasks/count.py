"""Counting: a box or a point for every object that the question means; their number is the answer."""

from perception.tasks import task
from perception.tasks.objects import ObjectList


@task("count")
class Count(ObjectList):
    metrics = ("count_exact", "count_ratio")
