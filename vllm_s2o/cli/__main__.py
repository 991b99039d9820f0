"""`python -P -m vllm_s2o.cli`, where no console script is installed."""

from vllm_s2o.cli.main import main

main()
