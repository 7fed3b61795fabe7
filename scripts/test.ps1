# Lint and test, in .venv, which is made when missing. Arguments go to pytest: scripts/test.ps1 -k padding
$python = if ($env:PYTHON) { $env:PYTHON } else { "python" }
& $python "$PSScriptRoot/run_tests.py" @args
exit $LASTEXITCODE
