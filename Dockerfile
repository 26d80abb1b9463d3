# syntax=docker/dockerfile:1
#
# nfold in a container: no shell, no package manager, no root, nothing written to the root file system.
#
#   docker build -t nfold .                                    # CPU
#   docker build -t nfold:cuda --build-arg VARIANT=cuda .      # CUDA 13 with cuDNN 9, x86-64
#   docker run --read-only -p 8000:8000 -v "$PWD/repository:/models:ro" nfold
#
# Pin the three base images by digest where you build: --build-arg RUNTIME_CPU=…@sha256:…
# deploy/check-dockerfile --build builds and tries it where no registry can be reached, and tests/dockerfile.rs lints it.

ARG VARIANT=cpu
ARG RUST=docker.io/library/rust:1.95.0-slim-bookworm
ARG PYTHON=docker.io/library/python:3.11-slim-bookworm
ARG RUNTIME_CPU=gcr.io/distroless/cc-debian12:nonroot
ARG RUNTIME_CUDA=docker.io/nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# --- the program -------------------------------------------------------------------------------------------------------
FROM ${RUST} AS build
# the program carries the list of its crates, which Trivy, Grype and `cargo audit bin` read, and which becomes the SBOM
RUN cargo install --quiet --locked --root /usr/local cargo-auditable@0.7.7 auditable2cdx@0.1.0
WORKDIR /build
ARG VARIANT
# dependencies first, with a program that does nothing: this layer lasts until the lock file changes
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
# the manifest names them
COPY benches benches
RUN mkdir src \
 && echo 'fn main() {}' >src/main.rs \
 && touch src/lib.rs \
 && cargo auditable build --release --locked --bin nfold --features "$([ "$VARIANT" = cuda ] && echo gpu)" \
 && rm -r src target/release/.fingerprint/nfold-* target/release/deps/*nfold*
COPY src src
RUN cargo auditable build --release --locked --bin nfold --features "$([ "$VARIANT" = cuda ] && echo gpu)" \
 && auditable2cdx target/release/nfold >sbom.cdx.json

# --- ONNX Runtime: the wheel's sha256 is checked against deploy/onnxruntime/*.txt -----------------------------------------
FROM ${PYTHON} AS onnxruntime-cpu
COPY deploy/onnxruntime /fetch
RUN /fetch/fetch cpu /onnxruntime

FROM ${PYTHON} AS onnxruntime-cuda
COPY deploy/onnxruntime /fetch
RUN /fetch/fetch gpu /onnxruntime

# --- what runs: ONNX Runtime in a layer of its own, below the program that changes more often ----------------------------
FROM ${RUNTIME_CPU} AS runtime-cpu
COPY --from=onnxruntime-cpu /onnxruntime /usr/lib/onnxruntime

FROM ${RUNTIME_CUDA} AS runtime-cuda
COPY --from=onnxruntime-cuda /onnxruntime /usr/lib/onnxruntime

FROM runtime-${VARIANT} AS nfold
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nfold" \
      org.opencontainers.image.description="Folds Normalizer-Free image classifiers into plain convolutions and serves them with ONNX Runtime" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/nfold/
COPY --from=build /build/sbom.cdx.json /usr/share/doc/nfold/sbom.cdx.json
COPY --from=build /build/target/release/nfold /usr/bin/nfold
# the third: memory of large bodies goes back to the system when they are answered; left alone, glibc learns to keep it
ENV ORT_DYLIB_PATH=/usr/lib/onnxruntime/libonnxruntime.so \
    NFOLD_REPOSITORY=/models \
    MALLOC_MMAP_THRESHOLD_=16777216 \
    NFOLD_LOG_FORMAT=json
USER 65532:65532
EXPOSE 8000 8001 8002
# the first probe comes after a start period; a server that still warms up is not yet unhealthy
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["/usr/bin/nfold", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/nfold"]
CMD ["serve"]
