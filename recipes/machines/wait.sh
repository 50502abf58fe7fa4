#!/usr/bin/env bash
# Waits until every server of the machines ADDRESS ... answers, then writes their URLs to the file SERVERS, one a line.
# PORT, GPUS and TP are those of server.sh; PATIENCE seconds (1800) are enough for a download.
set -euo pipefail
urls=()
for address in "$@"; do
    for ((i = 0; i < ${GPUS:-8} / ${TP:-1}; i++)); do urls+=("http://$address:$((PORT + i))"); done
done
for url in "${urls[@]}"; do
    until curl --silent --fail --max-time 5 "$url/health"; do
        ((SECONDS < ${PATIENCE:-1800})) || { echo "$url does not answer after $SECONDS s" >&2; exit 1; }
        sleep 2
    done
done
mkdir -p "$(dirname "$SERVERS")"
printf '%s\n' "${urls[@]}" > "$SERVERS.partial"
mv "$SERVERS.partial" "$SERVERS"
echo "${#urls[@]} servers answer, $SERVERS names them"
