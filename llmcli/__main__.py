"""`python -m llmcli`."""

from llmcli.cli.main import run

if __name__ == "__main__":
    run()
