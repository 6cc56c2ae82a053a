"""Make a wheel with setuptools: for one platform if `_native.c` compiled, for all platforms if not."""

from __future__ import annotations

import os

from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):  # type: ignore[misc]
    """A wheel that is named for every platform if it holds no compiled file."""

    def run(self) -> None:
        """Build, see what there is, and pack it."""
        self.run_command("build")
        compiled = self.get_finalized_command("build_ext").get_outputs()
        if not any(os.path.exists(path) for path in compiled):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()
