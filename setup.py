"""Find the packages and describe the native module; the rest of the packaging is in setup.cfg.

``dmrpc_cxl._native`` is dmrpc_cxl/_native.pyx and every C file of dmrpc_cxl/csrc, linked into one
module. A change in any of their sources, headers included, rebuilds it.
"""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

C_SOURCES = sorted(glob("dmrpc_cxl/csrc/*.c"))
INCLUDED = sorted(
    path for kind in ("*.pyx", "*.pxd", "*.pxi", "csrc/*.h") for path in glob(f"dmrpc_cxl/{kind}")
)

native = Extension(
    "dmrpc_cxl._native",
    sources=["dmrpc_cxl/_native.pyx", *C_SOURCES],
    include_dirs=["dmrpc_cxl", "dmrpc_cxl/csrc"],
    depends=["setup.py", *INCLUDED],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    packages=[
        *find_packages(include=["dmrpc_cxl*", "dmrpc_net*", "pyuserfaultfd*"]),
        *(f"dmrpc_cxl.{name}" for name in find_packages(include=["coordinator*", "fabric*"])),
    ],
    ext_modules=cythonize(
        [native], build_dir="build/cython", compiler_directives={"language_level": 3}
    ),
)
