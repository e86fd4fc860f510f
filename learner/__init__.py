"""The learner: DeepSpeed ranks in Ray actors take GRPO steps and hand the new weights out in buckets."""
