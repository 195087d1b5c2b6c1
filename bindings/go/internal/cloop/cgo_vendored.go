//go:build phd_vendored

package cloop

// As in package phd: each package that calls C is linked for itself first.

// #cgo CFLAGS: -I${SRCDIR}/../../vendored/include
// #cgo linux,amd64 LDFLAGS: ${SRCDIR}/../../vendored/lib/linux_amd64/libphd.a
// #cgo linux,arm64 LDFLAGS: ${SRCDIR}/../../vendored/lib/linux_arm64/libphd.a
// #cgo darwin,amd64 LDFLAGS: ${SRCDIR}/../../vendored/lib/darwin_amd64/libphd.a
// #cgo darwin,arm64 LDFLAGS: ${SRCDIR}/../../vendored/lib/darwin_arm64/libphd.a
// #cgo linux LDFLAGS: -lstdc++ -lgcc_s -lm -lpthread -ldl
// #cgo darwin LDFLAGS: -lc++ -lm
import "C"
