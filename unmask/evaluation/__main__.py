"""`python -m unmask.evaluation` is the harness's own command `lm_eval`, which then knows the model `unmask`."""

from lm_eval.__main__ import cli_evaluate

import unmask.evaluation.harness  # noqa: F401  registers it

if __name__ == "__main__":
    cli_evaluate()
