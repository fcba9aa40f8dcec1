"""Embedded comparisons: small tasks that are made here, trained through the same public classes as anybody's models.

`harness` runs jobs in worker processes and `report` summarises what they measured; every comparison uses these two.
`comparison` and `few_step` say what a job trains and measures, `tasks` is the table of tasks. A new task needs two
files: a module with its data, and its entry in `tasks`.
"""
