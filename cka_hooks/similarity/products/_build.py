"""How setuptools makes a wheel: for one platform where `_native.c` compiled, for all where it did not."""

from __future__ import annotations

import os

from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):  # type: ignore[misc]
    """A wheel without a compiled file in it is pure Python, and named so that every platform takes it."""

    def run(self) -> None:
        """Build, look at what there is, pack it."""
        self.run_command("build")
        compiled = self.get_finalized_command("build_ext").get_outputs()
        if not any(os.path.exists(path) for path in compiled):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()
