"""The suite `dialect-tasks`: is a labelled task solved better in a dialect with the adapter generated for it?"""

from hl_scale.evaluation.dialect_tasks.suite import SuiteResult, run_suite

__all__ = ["SuiteResult", "run_suite"]
