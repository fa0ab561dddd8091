"""`tessera completion`: the script by which a shell completes `tessera` commands."""

from launch.candidates import SHELLS, candidates
from launch.exit_codes import FINISHED

USAGE = """usage: tessera completion bash|zsh|fish

  eval "$(tessera completion bash)"                     in ~/.bashrc
  eval "$(tessera completion zsh)"                      in ~/.zshrc, after compinit
  tessera completion fish > ~/.config/fish/completions/tessera.fish

Completes commands, their options, experiments, groups, keys of the config and their values.
"""
ASK = "candidates"  # what the scripts ask with, and all words after `tessera` behind it
SCRIPTS = {
    "bash": r"""
_tessera() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$' \t' words found start
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local current="${words[${#words[@]}-1]}"
    IFS=$'\n'
    found=($("${words[0]}" completion candidates "${words[@]:1}" 2> /dev/null))
    # Bash has its own idea of where a word begins: it completes what comes after = and :.
    start="${current%"${current##*[$COMP_WORDBREAKS]}"}"
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] || start=""
    if [[ ${found[0]} == :files ]]; then
        compopt -o filenames 2> /dev/null
        COMPREPLY=($(compgen -f -- "${current#*=}"))
        return
    fi
    COMPREPLY=("${found[@]#"$start"}")
    if [[ ${#found[@]} -gt 0 && ${found[0]} == *[=.] ]]; then
        compopt -o nospace 2> /dev/null
    fi
}
complete -F _tessera tessera
""",
    "zsh": r"""
_tessera() {
    local -a found
    found=("${(@f)$("${words[1]}" completion candidates "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    if [[ $found[1] == :files ]]; then
        compset -P '*='
        _files
        return
    fi
    local -a open closed
    open=(${(M)found:#*[=.]})
    closed=(${found:#*[=.]})
    (( $#open )) && compadd -S '' -a open
    (( $#closed )) && compadd -a closed
}
compdef _tessera tessera
""",
    "fish": r"""
function __tessera_candidates
    set -l words (commandline -opc) (commandline -ct)
    set -l found ($words[1] completion candidates $words[2..-1] 2> /dev/null)
    if test "$found[1]" = :files
        set -l parts (string split -m 1 = -- $words[-1])
        for file in (__fish_complete_path $parts[2])
            echo $parts[1]=$file
        end
    else
        printf '%s\n' $found
    end
end
complete -c tessera -f -a '(__tessera_candidates)'
""",
}


def main(arguments: list[str]) -> int:
    """Print a shell's script, or for a script the candidates for the last word."""
    if arguments[:1] == [ASK]:
        print("\n".join(candidates(arguments[1:])))
        return FINISHED
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        raise ValueError(
            f"tessera completion {' '.join(arguments)}: no such shell is known; name one of "
            f"{', '.join(SHELLS)}"
        )
    print(SCRIPTS[arguments[0]].strip())
    return FINISHED
