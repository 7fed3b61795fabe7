# From a fresh clone to captions in a style of one's own, in minutes, on pictures and a tiny base that are here.
$python = if ($env:PYTHON) { $env:PYTHON } else { "python" }
& $python "$PSScriptRoot/quickstart.py" @args
exit $LASTEXITCODE
