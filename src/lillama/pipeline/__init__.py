"""From a model folder to a smaller one: the job, its context, the stages in their order."""
