# Makes .venv in the project's root with the pinned packages in it; does nothing where that is done.
# scripts/train and scripts/test source it:
#
#     project=...; source "$project/scripts/setup.sh"; set_up [EXTRA...]
#
# Extras that were set up once are kept, also where .venv is made anew.
#
# PYTHON=... chooses the interpreter. All it says goes to stderr; what a user can mend ends with one
# line, "error: ...", and exit status 2. It needs bash and coreutils. Where flock(1) is missing, two
# set-ups at the same time are not kept apart.
# shellcheck shell=bash

project=${project:?}
everyday=(plots search sweeps) # extras that the README's everyday commands need
venv=$project/.venv
stamp=$venv/.fashionnet-setup # what was set up; "unfinished" from the first step to the last
log=$venv/setup.log           # everything pip said

say() { printf 'fashionnet: %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

set_up() {
    set -- "${everyday[@]}" "$@"
    read_stamp
    if is_done "$@"; then return; fi
    lock
    read_stamp # another set-up may have done it meanwhile
    if ! is_done "$@"; then install "$@"; fi
    exec 9>&-
}

# -- what is there ---------------------------------------------------------------------------------

# True where .venv has the pinned packages and these extras. Starts no Python unless PYTHON is set:
# a few hundredths of a second.
is_done() {
    local extra
    is_intact || return 1
    [[ $done_pins == "$(hash_of_pins)" ]] || return 1
    for extra in "$@"; do
        [[ " $done_extras " == *" $extra "* ]] || return 1
    done
}

# True where .venv was finished once, in this very place, and still has the same interpreter.
is_intact() {
    [[ -n $done_pins && $done_pins != unfinished && $done_root == "$project" ]] || return 1
    [[ -x $venv/bin/python && $done_python == "$(readlink -f -- "$venv/bin/python")" ]] || return 1
    [[ -z ${PYTHON:-} || $done_base == "$(interpreter "$PYTHON" 2>/dev/null)" ]]
}

read_stamp() {
    done_pins='' done_root='' done_base='' done_python='' done_extras=''
    [[ -f $stamp ]] || return 0
    {
        read -r done_pins
        read -r done_root
        read -r done_base
        read -r done_python
        read -r done_extras
    } <"$stamp" || true
}

write_stamp() { # PINS EXTRAS; complete or not there at all
    printf '%s\n' "$1" "$project" "$base" "$(readlink -f -- "$venv/bin/python")" "$2" >"$stamp.new" &&
        mv -f -- "$stamp.new" "$stamp"
}

hash_of_pins() {
    local hash sum=(sha256sum)
    command -v sha256sum >/dev/null || sum=(shasum -a 256) # macOS
    hash=$(cd -- "$project" && cat pyproject.toml constraints.txt scripts/setup.sh | "${sum[@]}")
    printf '%s' "${hash%% *}"
}

# -- the interpreter -------------------------------------------------------------------------------

# Prints "VERSION PATH" of the interpreter that $1 stands for, also where $1 is a venv's or a shim.
# Status 10: the version does not do; 11: it cannot make virtual environments; else: no Python.
interpreter() {
    "$1" -c '
import os, sys
path = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
sys.stdout.write("%d.%d.%d " % sys.version_info[:3] + path + "\n")
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(10)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(11)
'
}

# Sets `python` and `base`, or ends with the reason why no interpreter does.
find_interpreter() {
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10) status no_venv='' old=''
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for python in "${candidates[@]}"; do
        status=0
        base=$(interpreter "$python" 2>/dev/null) || status=$?
        [[ $base == [23].*' /'* ]] || continue # whatever answered, it is no Python
        case $status in
            0) return ;;
            10) old=${old:-$base} ;;
            11) no_venv=${no_venv:-$base} ;;
        esac
    done
    if [[ -n $no_venv ]]; then
        fail "${no_venv#* } cannot make virtual environments: install python3-venv" \
            "(on Debian or Ubuntu: apt-get install python$(minor "$no_venv")-venv)," \
            "or name another interpreter with PYTHON=..."
    elif [[ -n ${PYTHON:-} && -n $old ]]; then
        fail "PYTHON=$PYTHON is Python ${old%% *}: name one of 3.10 to 3.13, or leave PYTHON unset"
    elif [[ -n ${PYTHON:-} ]]; then
        fail "PYTHON=$PYTHON is no Python: name one of 3.10 to 3.13, or leave PYTHON unset"
    fi
    fail "no Python of 3.10 to 3.13 found${old:+ (python3 is ${old%% *})}: install one (on Debian or" \
        "Ubuntu: apt-get install python3 python3-venv), or name one with PYTHON=..."
}

minor() { # "3.11.2 PATH" -> 3.11
    local version=${1%% *}
    printf '%s' "${version%.*}"
}

# -- making it -------------------------------------------------------------------------------------

# One set-up at a time. The lock is the open file, so it ends with the processes that hold it; pip
# inherits it, so that a pip whose script was killed is waited for too.
lock() {
    local said status=0
    said=$({ : >>"$venv.lock"; } 2>&1) || fail "cannot write to $project: ${said##*: };" \
        "free some space, or work on a copy in a folder of yours"
    exec 9>>"$venv.lock"
    command -v flock >/dev/null || return 0
    flock -n 9 2>/dev/null || status=$?
    if ((status == 1)); then # other numbers: a file system without locks
        say "another set-up is under way in $project: waiting for it"
        flock 9
    fi
}

install() {
    local extra pins before='' extras=$done_extras
    pins=$(hash_of_pins)
    SECONDS=0
    if is_intact; then
        base=$done_base
        before=$(<"$stamp")
        say "bringing .venv up to date: up to 2 minutes"
    elif is_foreign; then
        say "installing into the .venv that is there, Python ${base%% *}: up to 2 minutes"
    else
        make_venv
        say "installing the packages: 1 to 2 minutes, longer where torch comes with CUDA"
    fi
    for extra in "$@"; do
        [[ " $extras " == *" $extra "* ]] || extras="${extras:+$extras }$extra"
    done
    attempt write_unfinished
    pip_install "$extras" "$before"
    attempt write_stamp "$pins" "$extras"
    say "set up in $SECONDS s; before other commands in this shell: . $(printf %q "$venv")/bin/activate"
}

# True where .venv was made by somebody else and can be used; sets `base`.
is_foreign() {
    [[ ! -e $stamp && -f $venv/pyvenv.cfg ]] || return 1
    base=$(interpreter "$venv/bin/python" 2>/dev/null) || return 1
    "$venv/bin/python" -c 'import pip' 2>/dev/null || return 1
    [[ -z ${PYTHON:-} || $base == "$(interpreter "$PYTHON" 2>/dev/null)" ]]
}

make_venv() {
    if [[ -d $venv && ! -e $stamp && ! -f $venv/pyvenv.cfg && -n $(ls -A -- "$venv") ]]; then
        fail "$venv is there and is not a virtual environment: move it away"
    fi
    find_interpreter
    if [[ -e $stamp || -f $venv/pyvenv.cfg ]]; then
        say "making .venv anew with Python ${base%% *}: the old one is unfinished, moved or broken"
    else
        say "making .venv with Python ${base%% *}"
    fi
    attempt mkdir -p -- "$venv"
    attempt write_unfinished # before anything is removed
    attempt clear_venv
    attempt "$python" -m venv "$venv"
}

write_unfinished() { printf 'unfinished\n' >"$stamp"; }

clear_venv() ( # its contents: .venv itself may be a link to another disk
    shopt -s dotglob nullglob
    for path in "$venv"/*; do
        [[ $path == "$stamp" ]] || rm -rf -- "$path" || exit
    done
)

# Runs a step of the set-up in silence, or ends with the reason why it failed.
attempt() {
    local said reason
    if said=$("$@" 2>&1); then return; fi
    reason=$(disk_problem)
    fail "cannot set up $venv: ${reason:-$(last_line "$said")}"
}

pip_install() { # EXTRAS STAMP
    local problem reason
    if problem=$(run_pip ".${1:+[${1// /,}]}" 2>&1 | follow); then return; fi
    reason=$(disk_problem)
    if [[ -n $2 ]]; then printf '%s\n' "$2" >"$stamp"; fi # pip took its changes back
    fail "pip could not install the packages: ${reason:-$problem} (all that pip said: $log)"
}

# The constraints hold for the builds of source packages too: `-c` alone does not reach them.
run_pip() (
    cd -- "$project" || exit
    export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_USER=0
    exec "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off -c constraints.txt -e "$1"
)

# Writes pip's output to the log, tells on stderr of what takes long, and prints the line that says
# why pip failed, should it do so.
follow() {
    local line name version size commas error='' last='' retried=''
    local download='Downloading (.*/)?([^/ ]+) \(([0-9]{2,}\.[0-9] MB)\)'
    { exec 3>"$log"; } 2>/dev/null || exec 3>/dev/null
    while IFS= read -r line || [[ -n $line ]]; do
        { printf '%s\n' "$line" >&3; } 2>/dev/null || true # a full disk
        line=${line#"${line%%[![:space:]]*}"}
        case $line in
            'ERROR: '*) error=${line#ERROR: } ;;
            'Installing collected packages: '*)
                commas=${line//[!,]/}
                if [[ -n $commas ]]; then say "unpacking $((${#commas} + 1)) packages"; fi
                ;;
            'WARNING: Retrying '*)
                [[ -n $retried ]] || say "the package index does not answer; pip tries again"
                retried=yes
                ;;
            '' | WARNING* | note:* | hint:* | '[notice]'*) ;;
            *)
                last=$line
                if [[ $line =~ $download ]]; then
                    size=${BASH_REMATCH[3]}
                    IFS=- read -r name version _ <<<"${BASH_REMATCH[2]}"
                    say "downloading $name $version ($size)"
                fi
                ;;
        esac
    done
    printf '%s' "${error:-$last}${retried:+; is the network up?}"
}

# Prints why the disks that the set-up writes to cannot be written to, or nothing.
disk_problem() {
    local folder said
    for folder in "$project" "$venv" "${TMPDIR:-/tmp}"; do
        [[ -d $folder ]] || continue
        said=$({ head -c 4000000 /dev/zero >"$folder/.fashionnet-room"; } 2>&1) ||
            printf '%s in %s; free some space, or work on a copy elsewhere' "${said##*: }" "$folder"
        rm -f -- "$folder/.fashionnet-room"
        if [[ -n $said ]]; then return; fi
    done
}

last_line() {
    local line last=''
    while IFS= read -r line; do
        if [[ $line == *[![:space:]]* ]]; then last=$line; fi
    done <<<"$1"
    printf '%s' "$last"
}
