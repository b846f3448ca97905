"""Builds the package; its metadata stands in pyproject.toml, only the place of the configurations is said here."""

from setuptools import find_packages, setup

# configs/ stands beside the package, where people look for it; a wheel carries it as megatron_rlhf/configs, so that it
# never lands in site-packages under a name as common as "configs". config/load.py looks in both places.
setup(
    packages=[*find_packages(include=["megatron_rlhf", "megatron_rlhf.*"]), "megatron_rlhf.configs"],
    package_dir={"megatron_rlhf.configs": "configs"},
    package_data={"megatron_rlhf.configs": ["**/*.yaml"]},
)
