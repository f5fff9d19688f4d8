"""The tests on the machines that users have.

    pip install nox
    nox                                            # every session; each needs its Python, and DGL's a Linux machine
    nox -s oldest -- tests/test_transformer.py -x  # one session, some tests, any flags of pytest

On Linux, pip takes torch with its CUDA libraries, several GB, unless an environment variable like PIP_FIND_LINKS names
a place with CPU builds; `nox -R` uses what is installed already.
"""

import nox

ALL = ".[molecules,train,test]"


@nox.session(python="3.11")
def pinned(session):
    """What requirements.txt says: torch 2.13 and DGL 1.1.3."""
    session.install("-r", "requirements.txt")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def without_dgl(session):
    session.install(ALL, "torch==2.13.0")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def oldest(session):
    """The oldest Python and torch, and with the oldest e3nn what does not need its harmonics above degree 11."""
    session.install(ALL, "torch==2.6.0", "e3nn==0.6.0")
    session.run("pytest", *session.posargs)
    session.install("e3nn==0.5.5")
    session.run("pytest", "tests/test_golden.py", "tests/test_import.py", "tests/test_basis.py")


@nox.session(python=["3.12", "3.13"])
def newest(session):
    session.install(ALL, "torch==2.15.0")
    session.run("pytest", *session.posargs)
