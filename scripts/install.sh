#!/bin/sh
# Make .venv with the tested versions: `make install` runs this in the repository's root.
#
# PYTHON names the Python to use; without it the first that fits is taken. What pip prints goes to
# .venv.log. After an install that was interrupted or failed the next call begins anew: files of a
# package that is half installed would else be taken for the whole.
set -eu

goal=${1:-install} # what the user asked make for
venv=.venv
log=$venv.log
lock=$venv.lock # the numbers of this process and of the one it waits for
unfinished=$venv/.unfinished
stamp=$venv/.installed

fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# ------------------------------------------------------------------------------------- which Python

version_of() { # as 3.11
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

fits() {
  case $1 in 3.10 | 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac
}

named_python() {
  python=$PYTHON
  version=$(version_of "$python") || {
    why=$("$python" -c '' 2>&1 | head -n 1)
    fail "'$python' cannot be run: ${why:-it ends with an error}. $advice, or a path"
  }
  fits "$version" ||
    fail "cjepa_fast needs Python 3.10 to 3.13; '$python' is Python $version. $advice"
}

first_python_that_fits() {
  others=
  for python in python3 python3.11 python3.12 python3.13 python3.10; do
    command -v "$python" >/dev/null || continue
    version=$(version_of "$python") || version=
    if fits "$version"; then
      [ -z "$others" ] || echo "using $python, since$others"
      return
    fi
    others="$others $python ${version:+is Python }${version:-cannot be run};"
  done
  fail "cjepa_fast needs Python 3.10 to 3.13;${others:- no python3 is on the PATH;} $advice, or a path"
}

choose_python() {
  advice="Try: make $goal PYTHON=python3.11"
  if [ -n "${PYTHON:-}" ]; then named_python; else first_python_that_fits; fi
}

is_up_to_date() {
  [ -e "$stamp" ] && [ "$(version_of $venv/bin/python)" = "$version" ] &&
    [ -z "$(find setup.py constraints.txt scripts/install.sh -newer $stamp)" ]
}

# ------------------------------------------------------------------- one at a time, and interruption

running= # whether $! is a step's process

# A step's process writes the lock before anything else, and leads a process group, so that what it
# has started ends with it: begin LOCK SCRIPT COMMAND...
begin='
import os, sys
lock, script, *command = sys.argv[1:]
with open(lock, "w") as file:
    file.write(f"{script} {os.getpid()}\n")
os.setpgid(0, 0)
os.execvp(command[0], command)
'

is_alive() { # a dead process that nobody has waited for (Z) is not, where ps can tell
  kill -0 "$1" 2>/dev/null || return 1
  case $(ps -o stat= -p "$1" 2>/dev/null) in Z*) return 1 ;; esac
}

end_group() {
  kill -- "-$1" 2>/dev/null || kill "$1" 2>/dev/null || :
  for signal in TERM TERM TERM KILL; do
    is_alive "$1" || return 0
    sleep 1
    kill -$signal -- "-$1" 2>/dev/null || :
  done
}

leave() {
  status=$?
  trap '' HUP INT TERM
  set +u # an interruption may come before the first step has begun
  if [ -n "$running" ] && [ -n "$!" ]; then end_group $!; fi
  rm -f $lock
  exit $status
}

hold() {
  if ! (set -C && echo $$ >$lock) 2>/dev/null; then
    [ -e $lock ] || fail "$PWD cannot be written to"
    read -r script pip <$lock || :
    ! is_alive "$script" ||
      fail "process $script installs into $venv: wait for it, or end it (not so? rm $lock)"
    end_orphan "$pip"
    echo $$ >$lock
  fi
  trap leave EXIT
  trap 'echo; fail "interrupted: the next make begins the install anew"' HUP INT TERM
}

end_orphan() { # what a script that was killed has left running; another process may have its number
  case $(ps -o args= -p "${1:-0}" 2>/dev/null) in
    *" -m pip "* | *" -m venv "*)
      echo "ending process $1, which an interrupted install left"
      end_group "$1"
      ;;
  esac
}

# ---------------------------------------------------------------------------------------- the steps

doing() { # what pip is at, from its log
  sed -n 's/^ *\(Collecting [^ ]*\).*/\1/p; s/^ *\(Downloading [^ ]*\).*/\1/p
    s/^\(Installing collected packages\).*/\1/p' $log | tail -n 1
}

step() { # step WHAT COMMAND...: into the log; at a terminal, with a line that tells how far it is
  what=$1
  shift
  began=$(date +%s)
  columns=$(stty size 2>/dev/null </dev/tty | cut -d ' ' -f 2) || columns=
  [ "${columns:-0}" -gt 1 ] || columns=80
  printf '\n$ %s\n' "$*" >>$log
  if ! [ -t 1 ]; then echo "$what"; fi
  running=yes
  "$python" -c "$begin" $lock $$ "$@" >>$log 2>&1 </dev/null &
  while kill -0 $! 2>/dev/null; do
    if [ -t 1 ]; then
      printf "\r\033[K%.$((columns - 1))s" "$what: $(($(date +%s) - began)) s. $(doing)"
    fi
    sleep 1
  done
  status=0
  wait $! || status=$?
  running=
  if [ -t 1 ]; then printf '\r\033[K'; fi
  if [ $status -ne 0 ]; then
    grep -v '^WARNING: Location\|^ *$' $log | tail -n 15 >&2
    [ $status -le 128 ] || echo "$what: killed by signal $((status - 128))" >&2
    return $status
  fi
  echo "$what: done in $(($(date +%s) - began)) s"
}

pip_install() { # pip_install WHAT ARGUMENTS...
  what=$1
  shift
  step "$what" $venv/bin/python -m pip install --no-user --constraint constraints.txt "$@" ||
    fail "$what: failed; pip's output is in $log. Call make again once that is mended"
}

discard() { # under another name first: what an interruption leaves is no environment
  rm -rf $venv.old
  mv $venv $venv.old
  rm -rf $venv.old
}

discard_what_cannot_serve() {
  if [ -e $unfinished ]; then
    echo "the last install did not end well: beginning anew"
  elif [ "$(version_of $venv/bin/python)" != "$version" ]; then
    echo "$venv is not of Python $version: making it anew"
  elif ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "$venv has no pip: making it anew"
  else
    return 0
  fi
  discard
}

make_venv() {
  mkdir $venv
  : >$unfinished
  step "making $venv (Python $version)" "$python" -m venv $venv || {
    discard
    fail "no venv: install Python's venv module (Debian: python3-venv); the output is in $log"
  }
}

choose_python
if is_up_to_date; then exit 0; fi
hold
: >$log
rm -rf $venv.old
if [ -e $venv ]; then discard_what_cannot_serve; fi
if ! [ -e $venv ]; then make_venv; fi
: >$unfinished
rm -f $stamp
pip_install "installing torch" torch setuptools wheel
pip_install "installing cjepa_fast and what it needs" --editable '.[dev]'
# tests/vision_ops.py says why torchvision lies apart
pip_install "installing torchvision and timm for the tests" --no-deps --upgrade \
  --target $venv/torchvision torchvision timm
rm $unfinished
touch $stamp
